"""A trained backbone in the format of the library that will load it, and its model card."""
