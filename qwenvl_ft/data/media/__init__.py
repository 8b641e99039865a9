"""Images and videos: opened safely, sized from their headers, decoded within a deadline."""
