"""One optimizer step, and what is known of it afterwards."""
