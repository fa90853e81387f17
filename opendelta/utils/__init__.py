"""The import paths of OpenDelta 0.3.2, one re-export each. New code imports from `opendelta`."""
