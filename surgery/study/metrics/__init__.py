"""Where a trial's metric is found, without an edit to its script: result files, tables, event files, its output."""
