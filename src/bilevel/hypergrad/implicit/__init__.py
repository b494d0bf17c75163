"""Of the inner solution alone, by the implicit function theorem."""
