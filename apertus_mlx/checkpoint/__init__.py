"""What is on disk: config, headers, the inventory of a checkpoint; no array is read here."""
