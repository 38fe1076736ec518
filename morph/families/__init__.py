"""Where a Hugging Face model keeps its attention: one file per `model_type`."""
