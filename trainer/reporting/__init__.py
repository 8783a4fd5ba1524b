"""A run as one HTML page: what its folder holds, its curves as SVG, its pictures inline; nothing from elsewhere."""
