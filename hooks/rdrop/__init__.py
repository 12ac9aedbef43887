"""R-Drop: Liang et al., NeurIPS 2021, arXiv 2106.14448."""
