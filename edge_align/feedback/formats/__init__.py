"""One module per feedback format; each holds `FORMAT`, and `feedback.detect.FORMATS` lists them."""
