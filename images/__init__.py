"""Images as people have them: files, hub data sets, formats, colours."""
