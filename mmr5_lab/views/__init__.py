"""What a person looks at: browser, widgets, plots, annotator."""
