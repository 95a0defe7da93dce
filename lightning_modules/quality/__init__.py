"""Image quality: what is measured on images that a model makes, and how."""
