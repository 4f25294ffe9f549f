"""Documents, their pages, questions and rankings; PDFs and MMDocIR in."""
