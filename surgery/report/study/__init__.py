"""A study as rows, and of them a table for the terminal, files, figures and a page."""
