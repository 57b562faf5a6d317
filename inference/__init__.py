"""How a posterior is computed."""
