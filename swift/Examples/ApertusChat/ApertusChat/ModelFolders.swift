import Foundation

/// Where models lie: in the app's documents, where Files and the Finder put them, in what the app
/// has downloaded, and in its bundle.
enum ModelFolders {
    /// Of this app, created when it is first asked for; not part of backups.
    static var downloads: URL {
        var folder = URL.applicationSupportDirectory.appending(
            path: "Models", directoryHint: .isDirectory)
        try? FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
        var values = URLResourceValues()
        values.isExcludedFromBackup = true
        try? folder.setResourceValues(values)
        return folder
    }

    /// All folders that hold a model.
    static func all() -> [URL] {
        let places = [URL.documentsDirectory, downloads, Bundle.main.resourceURL].compactMap { $0 }
        return places.flatMap { place in
            (try? FileManager.default.contentsOfDirectory(
                at: place, includingPropertiesForKeys: nil, options: .skipsHiddenFiles)) ?? []
        }
        .filter(isModel)
        .sorted { $0.lastPathComponent < $1.lastPathComponent }
    }

    static func isModel(_ folder: URL) -> Bool {
        ["config.json", "tokenizer.json"].allSatisfy { name in
            FileManager.default.fileExists(
                atPath: folder.appending(path: name).path(percentEncoded: false))
        }
    }
}
