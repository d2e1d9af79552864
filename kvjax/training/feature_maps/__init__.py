"""Training of the feature maps that completion reads by."""
