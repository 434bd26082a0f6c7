"""Numbers: quantization formats and algorithms on arrays. Knows no file and no model."""
