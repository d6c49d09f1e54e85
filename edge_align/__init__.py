"""On-device personalisation of a local language model (see README.md). Importing this package does nothing."""

__version__ = "0.1.0"
