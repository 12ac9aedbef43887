"""Put a perturbed checkpoint on the Hub."""

import surgery.progress  # noqa: F401  before huggingface_hub, which would warn of missing ipywidgets
