"""The rest of the documented surface of pipelines: methods and settings that generating does not need."""
