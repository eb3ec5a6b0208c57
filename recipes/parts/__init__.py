"""What the recipes are made of: text and images, models, and a training from start to end."""
