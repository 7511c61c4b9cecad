"""From a saved model or cache to a repository on the Hub, or to a file for another library."""
