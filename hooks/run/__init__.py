"""`surgery run`: a command whose training processes are regularized from outside, without an edit of its scripts."""
