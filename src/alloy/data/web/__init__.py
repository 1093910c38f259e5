"""From web pages to text that keeps mathematics, code and tables."""
