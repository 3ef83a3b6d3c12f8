r"""The demo and the comparison: flows within their world and without, measured and shown."""
