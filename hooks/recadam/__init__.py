"""RecAdam: Chen et al., EMNLP 2020, arXiv 2004.12651."""
