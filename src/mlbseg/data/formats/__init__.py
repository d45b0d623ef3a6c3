"""The file formats, a module each: how a header is read and judged, and how its pixels come."""
