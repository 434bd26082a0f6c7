import ApertusCore
import Foundation

/// Whether a folder is what its manifest says, and whether this package can run it.
public struct Verification: Sendable {
    /// An error makes the folder unusable or untrue, a warning does not.
    public enum Level: String, Sendable { case error, warning }

    /// What is wrong, and where.
    public struct Finding: Sendable, Equatable {
        public let level: Level
        /// The file, tensor or key.
        public let place: String
        public let text: String
    }

    public let folder: URL
    /// How many files the folder has.
    public let files: Int
    public let findings: [Finding]

    /// What makes the folder unusable or untrue.
    public var errors: [Finding] { findings.filter { $0.level == .error } }

    /// Check all of `folder`: sizes and SHA-256 of every file, names, shapes and types of all
    /// tensors, the tokenizer and the golden prompts. Weights are hashed a block at a time, not
    /// loaded.
    ///
    /// It takes as long as the files take to be read; call it from a task in the background.
    ///
    /// - Parameter onBytes: is told the bytes hashed so far, and all; what it throws ends this.
    /// - Throws: `ApertusError` of kind `notFound` without such a folder.
    public init(
        folder: URL, onBytes: (_ done: Int, _ total: Int) throws -> Void = { _, _ in }
    ) throws {
        self.folder = folder
        let names = try ModelFile.names(in: folder)
        files = names.count
        findings = try Self.manifest(folder, names, onBytes) + Self.model(folder)
    }

    private static func manifest(
        _ folder: URL, _ names: [String], _ onBytes: (Int, Int) throws -> Void
    ) throws -> [Finding] {
        let manifest: Manifest
        do {
            guard let found = try Manifest(folder: folder) else {
                return [
                    Finding(
                        level: .error, place: Manifest.fileName,
                        text: "is missing; only folders made by apertus-mlx convert have one")
                ]
            }
            manifest = found
        } catch let error as ApertusError {
            return [Finding(level: .error, place: Manifest.fileName, text: error.description)]
        }
        let wrong = try manifest.verify(folder, progress: onBytes).map {
            Finding(level: .error, place: $0.file, text: $0.text)
        }
        let strangers = names.filter { manifest.files[$0] == nil && $0 != Manifest.fileName }
        return wrong
            + strangers.map { name in
                Finding(
                    level: name.hasSuffix(".safetensors") ? .error : .warning, place: name,
                    text: "is not in the manifest")
            }
    }

    private static func model(_ folder: URL) -> [Finding] {
        do {
            let opened = try ModelFolder(folder)
            _ = try Checkpoint(folder: folder)
            var findings: [Finding] = []
            for text in try GoldenPrompts(folder: folder)?.differing(opened.tokenizer) ?? [] {
                findings.append(
                    Finding(
                        level: .error, place: GoldenPrompts.fileName,
                        text: "\(text.text.prefix(60).debugDescription) has other token ids today"))
            }
            do {
                _ = try opened.chatFormat()
            } catch let error as ApertusError {
                findings.append(
                    Finding(level: .warning, place: "chat template", text: error.description))
            }
            return findings
        } catch {
            return [Finding(level: .error, place: "weights", text: "\(error)")]
        }
    }
}
