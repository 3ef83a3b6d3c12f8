r"""What the benchmarks of image models share: what is measured, what is kept, and how it is told."""
