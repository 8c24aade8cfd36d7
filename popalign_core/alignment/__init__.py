"""Moving a text-to-image model towards preferred populations: objectives, trainer, policies, stopping."""
