"""The model: its layers and their arithmetic, and what only speeds them up."""
