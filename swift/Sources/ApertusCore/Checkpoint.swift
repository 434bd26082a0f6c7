import Foundation

/// A weight matrix with its format and the tensors that hold it.
public struct StoredMatrix: Sendable, Equatable {
    /// A factor of the product where the codes' own format has no place for it: `[1]` or `[rows]`.
    public enum Factor: Sendable, Equatable {
        case scale(TensorInfo)
        case divisor(TensorInfo)
    }

    public let layout: MatrixLayout
    /// Its quantized format; nil where it is stored as floats.
    public let format: QuantizedFormat?
    public let weight: TensorInfo
    /// Nil where the matrix is stored as floats; biases also in the floating-point formats.
    public let scales: TensorInfo?
    public let biases: TensorInfo?
    public let factor: Factor?

    /// The tensors but the factor's.
    public var tensors: [TensorInfo] { [weight] + [scales, biases].compactMap { $0 } }

    /// Bytes in memory where each float, and each scale and bias, takes `floatBytes`.
    public func weightBytes(_ floatBytes: Int) -> Int {
        format?.weightBytes(rows: layout.rows, columns: layout.columns, scaleBytes: floatBytes)
            ?? layout.rows * layout.columns * floatBytes
    }
}

/// A model folder whose tensors match its config: all that can be wrong with it is found before any
/// array is read.
///
/// Reads `config.json`, the headers, xIELU's constants, and a head that is stored though it is tied.
public struct Checkpoint: Sendable {
    public let folder: URL
    public let config: ModelConfig
    public let files: WeightFiles
    /// Each weight matrix by its module path.
    public let matrices: [String: StoredMatrix]
    /// Norms and xIELU's parameters by name.
    public let vectors: [String: TensorInfo]
    /// Constants of xIELU that some exporters leave out, and what they are then.
    public let absentConstants: [String: Float]
    /// Tensors that are in the files but not in the model, and why.
    public let dropped: [String: String]

    static let floats: Set = ["BF16", "F16", "F32"]
    /// Values of the constants that may be absent.
    static let constants: [String: Float] = ["beta": 0.5, "eps": -1e-6]

    /// Check the model in `folder`.
    ///
    /// - Throws: `ApertusError` that names file, key or tensor: a tensor is missing, unexpected, or of
    ///   another shape or type than the config says; the weights have to be converted first; or a
    ///   constant of xIELU is such that Float cannot compute with it.
    public init(folder: URL) throws {
        let config = try ModelConfig(folder: folder)
        let files = try WeightFiles(folder: folder)
        var left = Unmatched(tensors: files.tensors, name: folder.filePath)
        if let method = config.leftOverMethod,
            files.tensors.values.contains(where: { !Self.floats.contains($0.dtype) })
        {
            throw WrittenQuantization.refusal(of: method, folder.filePath)
        }
        let tied = try left.takeTiedHead(config)
        let layouts = Layout.matrices(config)
        let stored = Set(left.tensors.keys.map { $0[..<($0.lastIndex(of: ".") ?? $0.startIndex)] })
        let absent = layouts.filter { !stored.contains($0.path[...]) }.map(\.weight)
        guard absent.isEmpty else {
            throw ApertusError(.rejected, "\(left.name): missing \(Unmatched.listed(absent))")
        }
        var matrices: [String: StoredMatrix] = [:]
        for layout in layouts { matrices[layout.path] = try left.matrix(layout, config) }
        if config.quantization != nil, matrices.values.allSatisfy({ $0.format == nil }) {
            throw ApertusError(
                .rejected, "\(left.name): the config says quantized, but no tensor is")
        }
        (vectors, absentConstants) = try left.vectors(config)
        try left.refuseRest()
        (self.folder, self.config, self.files) = (folder, config, files)
        (self.matrices, dropped) = (matrices, left.dropped)
        for (head, embedding) in tied where try !sameBytes(head, embedding) {
            throw ApertusError(
                .rejected,
                "\(left.name): \(head.name) differs from the embedding, but tie_word_embeddings is true")
        }
        try checkSlopes()
    }

    /// Module path -> format, for the quantized matrices.
    public var formats: [String: QuantizedFormat] { matrices.compactMapValues(\.format) }

    /// The safetensors types of all floats in matrices, scales and biases included.
    public var floatTypes: Set<String> {
        Set(matrices.values.flatMap(\.tensors).map(\.dtype)).intersection(Self.floats)
    }

    /// Bytes of all tensors that belong to the model, as they are stored.
    package var storedBytes: Int {
        files.tensors.values.reduce(0) { $0 + (dropped[$1.name] == nil ? $1.byteCount : 0) }
    }

    /// Bytes of weights that one token reads: all, but of the embedding one row.
    ///
    /// A tied embedding is the head as well, and so is read whole, too.
    package var readBytes: Int {
        let table = matrices[Layout.embedding]?.tensors.reduce(0) { $0 + $1.byteCount } ?? 0
        return storedBytes - (config.tiesEmbeddings ? 0 : table) + table / config.vocabSize
    }

    /// Whether two tensors of one shape and type hold the same bytes.
    private func sameBytes(_ first: TensorInfo, _ second: TensorInfo) throws -> Bool {
        let (a, b) = (try ModelFile(files.url(of: first)), try ModelFile(files.url(of: second)))
        let block = 1 << 22
        for start in stride(from: 0, to: first.byteCount, by: block) {
            let count = min(block, first.byteCount - start)
            guard try a.read(at: first.offset + start, count: count)
                == b.read(at: second.offset + start, count: count)
            else { return false }
        }
        return true
    }

    /// Refuse constants of xIELU with which Float cannot compute: it squares its input and multiplies
    /// by a slope, and the next norm squares that again. Slopes of trained models stay below 170.
    private func checkSlopes() throws {
        for (name, tensor) in vectors.sorted(by: { $0.key < $1.key }) where name.contains(".act_fn.") {
            let most: Float = name.hasSuffix(".eps") ? 1 : 1e6
            guard let value = try number(tensor), !(abs(value) <= most) else { continue }
            throw ApertusError(
                .rejected,
                "\(folder.filePath): \(name): \(shown(value)) is beyond what a trained model has (at "
                    + "most \(shown(most))); the checkpoint is damaged")
        }
    }

    private func shown(_ value: Float) -> String { String(format: "%g", Double(value)) }

    /// The one number of a tensor; nil where it is no single float, which others refuse.
    private func number(_ tensor: TensorInfo) throws -> Float? {
        guard Self.floats.contains(tensor.dtype), tensor.shape.allSatisfy({ $0 == 1 }) else { return nil }
        let data = try ModelFile(files.url(of: tensor)).read(at: tensor.offset, count: tensor.byteCount)
        let bits = data.reversed().reduce(UInt32(0)) { $0 << 8 | UInt32($1) }
        switch tensor.dtype {
        case "F32": return Float(bitPattern: bits)
        case "BF16": return Float(bitPattern: bits << 16)
        default: return halfFloat(UInt16(truncatingIfNeeded: bits))
        }
    }

    /// IEEE 754 binary16, which Swift's standard library does not have everywhere.
    private func halfFloat(_ bits: UInt16) -> Float {
        let (exponent, fraction) = (Int(bits >> 10 & 0x1F), Float(bits & 0x3FF))
        let size: Float =
            switch exponent {
            case 0: fraction * 0x1p-24
            case 31: fraction == 0 ? .infinity : .nan
            default: Float(sign: .plus, exponent: exponent - 15, significand: 1 + fraction / 1024)
            }
        return bits >> 15 == 1 ? -size : size
    }
}
