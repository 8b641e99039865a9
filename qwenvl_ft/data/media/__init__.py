"""Images and videos: open them safely, read their size from the header, decode them within a time limit."""
