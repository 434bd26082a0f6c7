"""A larger model to judge quantizers by, trained from text that the package registries carry."""
