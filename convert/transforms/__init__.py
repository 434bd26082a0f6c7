"""Changes of basis that leave the model's function as it is: rotation and smoothing."""
