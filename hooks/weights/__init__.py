"""Which weights of a model are regularized, and their w_pre."""
