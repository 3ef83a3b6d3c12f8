r"""The kernels of the splines: the specification of a bin, two bins, more bins, and their gradients."""
