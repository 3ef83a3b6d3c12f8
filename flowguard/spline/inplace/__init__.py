r"""The same splines computed in place: for eager mode on the CPU without recorded gradients."""
