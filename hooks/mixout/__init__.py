"""Mixout: Lee et al., ICLR 2020, arXiv 1909.11299."""
