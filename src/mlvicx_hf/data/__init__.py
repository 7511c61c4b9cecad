"""Files and labels: from radiographs on disk to a prepared cache with splits that never share a patient."""
