"""The rest of the documented surface of models: methods, attention processors, tiles that blend."""
