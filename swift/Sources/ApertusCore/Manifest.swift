import Foundation

/// `apertus_mlx_manifest.json`: what a folder is, where it came from, what each file hashes to.
public struct Manifest: Sendable, Equatable {
    public static let fileName = "apertus_mlx_manifest.json"
    static let formatVersion = 1

    /// What a file must be.
    public struct FileRecord: Sendable, Equatable {
        public let byteCount: Int
        /// In hexadecimal.
        public let sha256: String
    }

    /// What is wrong with a file, in words.
    public struct Finding: Sendable, Equatable {
        public let file: String
        public let text: String
    }

    /// Name -> what the file must be.
    public let files: [String: FileRecord]
    /// With scales and biases counted.
    public let bitsPerWeight: Double
    /// The form of the chat template: `v1`, `v1.1`, `v1-first` or `unknown`; nil where none is said.
    public let chatTemplate: String?
    /// What the system block of a prompt holds where a conversation has none; `{date}` in it is the
    /// day, as in 2026-11-27. Nil where the form of the template is not known.
    public let defaultSystem: String?
    /// What the memory plan is computed from; nil in manifests that do not say.
    public let memory: MemoryTerms?
    /// The config's numbers by their names there; empty in manifests that do not say.
    let architecture: [String: Int]

    /// Read the manifest in `folder`; nil where there is none.
    ///
    /// - Throws: `ApertusError`: it is damaged, or of a version that this package does not know.
    public init?(folder: URL) throws {
        let url = folder.appendingPathComponent(Self.fileName)
        guard ModelFile.exists(url) else { return nil }
        try self.init(readObject(url), name: url.filePath)
    }

    init(_ object: JSON, name: String) throws {
        let keys = KeyReader(object, name)
        let version = try keys.integer("format_version", 1 ... 1 << 31)
        guard version == Self.formatVersion else {
            throw ApertusError(
                .rejected,
                "\(name): format_version \(version); this package knows \(Self.formatVersion)")
        }
        var files: [String: FileRecord] = [:]
        for member in try keys.object("files")?.members ?? [] {
            let file = String(decoding: member.key, as: UTF8.self)
            guard ModelFile.isPlainName(file), member.value.members != nil else {
                throw ApertusError(
                    .rejected,
                    "\(name): files: \(quoted(file.cut(80))) is not a plain file name with facts")
            }
            let record = KeyReader(member.value, "\(name): files: \(file)")
            let digest = try record.text("sha256")
            guard digest.utf8.count == 64, digest.utf8.allSatisfy("0123456789abcdef".utf8.contains) else {
                throw ApertusError(
                    .rejected, "\(name): files: \(file): sha256 is not 64 hexadecimal digits")
            }
            files[file] = FileRecord(
                byteCount: try record.integer("size_bytes", 0 ... 1 << 60), sha256: digest)
        }
        guard !files.isEmpty else {
            throw ApertusError(.rejected, "\(name): files: names no files")
        }
        self.files = files
        _ = try keys.object("source")
        bitsPerWeight = try keys.number("bits_per_weight", above: 0, to: 1e6)
        chatTemplate = try keys.optionalText("chat_template")
        defaultSystem = try keys.optionalText("default_system")
        let shape = try keys.object("architecture").map { ($0, KeyReader($0, "\(name): architecture")) }
        architecture = try Dictionary(
            (shape?.0.members ?? []).compactMap { member in
                guard let shape, member.value.isInteger else { return nil }
                let key = String(decoding: member.key, as: UTF8.self)
                return (key, try shape.1.integer(key, 0 ... .max))
            }, uniquingKeysWith: { $1 })
        memory = try keys.object("memory").map { try MemoryTerms($0, name: "\(name): memory") }
    }

    /// Check that the manifest describes a model of this config.
    ///
    /// - Throws: `ApertusError` that names the first number that differs.
    public func check(_ config: ModelConfig) throws {
        let sizes = [
            ("hidden_size", config.hiddenSize), ("intermediate_size", config.intermediateSize),
            ("num_hidden_layers", config.layers), ("num_attention_heads", config.heads),
            ("num_key_value_heads", config.kvHeads), ("head_dim", config.headDim),
            ("vocab_size", config.vocabSize), ("output_vocab_size", config.outputVocabSize),
            ("max_position_embeddings", config.maxPositions),
            ("parameters", Layout.parameterCount(config)),
        ]
        for (key, size) in sizes {
            guard let said = architecture[key], said != size else { continue }
            throw ApertusError(
                .rejected,
                "\(Self.fileName): architecture: \(key): \(said), but \(ModelConfig.fileName) has "
                    + "\(size); fetch the folder again")
        }
    }

    /// Check that every file is there, of its size; hashes nothing.
    ///
    /// - Throws: `ApertusError` that names the first file that is not.
    public func checkSizes(_ folder: URL) throws {
        for (name, record) in inOrder {
            if let finding = Self.sizeFinding(folder, name, record) {
                throw ApertusError(
                    .rejected,
                    "\(folder.appendingPathComponent(name).filePath): \(finding.text); "
                        + "fetch the folder again")
            }
        }
    }

    /// What is wrong with the folder's files: sizes and hashes, which are computed a block at a time.
    ///
    /// - Parameter progress: called with the bytes that are hashed so far, and with all; it may throw
    ///   to end this.
    public func verify(
        _ folder: URL, progress: (_ done: Int, _ total: Int) throws -> Void = { _, _ in }
    ) throws -> [Finding] {
        var findings: [Finding] = []
        let total = files.values.reduce(0) { $0.addingReportingOverflow($1.byteCount).partialValue }
        var done = 0
        for (name, record) in inOrder {
            if let finding = Self.sizeFinding(folder, name, record) {
                findings.append(finding)
                continue
            }
            let digest = try Self.sha256(folder.appendingPathComponent(name)) { count in
                done += count
                try progress(done, total)
            }
            if digest != record.sha256 {
                findings.append(
                    Finding(file: name, text: "was changed: its hash is not the manifest's"))
            }
        }
        return findings
    }

    /// The hash of a file's bytes, in hexadecimal.
    static func sha256(_ url: URL, progress: (Int) throws -> Void = { _ in }) throws -> String {
        let file = try ModelFile(url)
        var digest = Digest256()
        let block = 1 << 20
        for start in stride(from: 0, to: file.size, by: block) {
            let data = try file.read(at: start, count: min(block, file.size - start))
            digest.update(data)
            try progress(data.count)
        }
        return digest.finish().map { ($0 < 16 ? "0" : "") + String($0, radix: 16) }.joined()
    }

    private var inOrder: [(key: String, value: FileRecord)] {
        files.sorted { $0.key.utf8.lexicographicallyPrecedes($1.key.utf8) }
    }

    private static func sizeFinding(_ folder: URL, _ name: String, _ record: FileRecord) -> Finding? {
        let url = folder.appendingPathComponent(name)
        guard ModelFile.exists(url) else { return Finding(file: name, text: "is missing") }
        do {
            let size = try ModelFile(url).size
            if size == record.byteCount { return nil }
            return Finding(
                file: name, text: "has \(size) bytes, the manifest says \(record.byteCount)")
        } catch {
            return Finding(file: name, text: "\(error)")
        }
    }
}
