"""What a quantized model lost, measured on text."""
