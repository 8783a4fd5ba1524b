"""The way from prepared data to a first configuration."""
