"""One self-contained HTML report a run, and contact sheets: plain rows and image bytes in, text and bytes out."""
