"""Results as rows of plain data, then as a table, JSON or a picture: every command's file has rows() and table()."""
