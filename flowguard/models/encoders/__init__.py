r"""The networks that read the condition of an image model."""
