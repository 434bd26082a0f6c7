"""What neighbouring tools write of an Apertus model, and whether we read it right."""
