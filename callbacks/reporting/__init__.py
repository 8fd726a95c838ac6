"""Text made of results: tables in Markdown and LaTeX, the paper's rows, model cards."""
