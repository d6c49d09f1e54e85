"""Inference engines behind one small protocol (`runtime.base.Backend`)."""
