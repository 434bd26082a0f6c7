/// The tensors of a checkpoint that no part of the model has taken yet.
struct Unmatched {
    private(set) var tensors: [String: TensorInfo]
    /// What error messages call the checkpoint.
    let name: String
    /// Tensor name -> why it has no place in the model.
    private(set) var dropped: [String: String] = [:]

    init(tensors: [String: TensorInfo], name: String) {
        (self.tensors, self.name) = (tensors, name)
    }

    /// Take the tensors of a matrix: in MLX's formats where scales are stored, else as floats.
    mutating func matrix(_ layout: MatrixLayout, _ config: ModelConfig) throws -> StoredMatrix {
        let (path, rows, columns) = (layout.path, layout.rows, layout.columns)
        let format = config.quantization?.format(of: path)
        guard tensors["\(path).scales"] != nil else {
            guard let weight = tensors[layout.weight] else { throw missing(layout.weight) }
            if format != nil, weight.dtype == "U32" { throw missing("\(path).scales") }
            return StoredMatrix(
                layout: layout, format: nil,
                weight: try need(layout.weight, Checkpoint.floatNames, [rows, columns]),
                scales: nil, biases: nil, factor: nil)
        }
        guard let format else {
            throw ApertusError(
                .rejected,
                "\(name): \(path) is quantized, but the config's quantization does not say so")
        }
        guard format.fits(columns) else {
            throw ApertusError(
                .rejected, "\(name): \(path): \(columns) columns do not divide into \(format)")
        }
        let groups = [rows, format.groups(columns)]
        let weight = try need(layout.weight, ["U32"], [rows, format.packedColumns(columns)])
        let scaleTypes = format.hasBiases ? Checkpoint.floatNames : ["U8"]
        let scales = try need("\(path).scales", scaleTypes, groups)
        let biases =
            format.hasBiases ? try need("\(path).biases", Checkpoint.floatNames, groups) : nil
        return StoredMatrix(
            layout: layout, format: format, weight: weight, scales: scales, biases: biases,
            factor: path == Layout.embedding ? nil : try factor(layout))
    }

    /// Norms and xIELU's parameters; and the constants that are absent, with their values.
    mutating func vectors(
        _ config: ModelConfig
    ) throws -> (found: [String: TensorInfo], absent: [String: Float]) {
        let layouts = Layout.vectors(config)
        var found: [String: TensorInfo] = [:]
        var absent: [String: Float] = [:]
        var lost: [String] = []
        for (key, _) in layouts where tensors[key] == nil {
            let constant = key.split(separator: ".").last.map(String.init) ?? ""
            if let value = Checkpoint.constants[constant] { absent[key] = value } else { lost.append(key) }
        }
        guard lost.isEmpty else {
            throw ApertusError(.rejected, "\(name): missing \(Self.listed(lost))")
        }
        for (key, shape) in layouts where absent[key] == nil {
            found[key] = try need(key, Checkpoint.floatNames, shape)
        }
        return (found, absent)
    }

    /// Leave out a head that is stored although the config ties it to the embedding.
    ///
    /// - Returns: pairs of tensors, head and embedding, that must hold the same bytes.
    mutating func takeTiedHead(_ config: ModelConfig) throws -> [(head: TensorInfo, embedding: TensorInfo)] {
        guard config.tiesEmbeddings else { return [] }
        var pairs: [(TensorInfo, TensorInfo)] = []
        let heads = tensors.filter { $0.key.hasPrefix("\(Layout.head).") }
        for (key, head) in heads.sorted(by: { $0.key < $1.key }) {
            let embedding = tensors[Layout.embedding + key.dropFirst(Layout.head.count)]
            guard let embedding, (embedding.dtype, embedding.shape) == (head.dtype, head.shape) else {
                throw ApertusError(
                    .rejected, "\(name): \(key): stored beside tied embeddings of another form")
            }
            pairs.append((head, embedding))
            drop(key, "equal to the tied embedding")
        }
        return pairs
    }

    /// Refuse what no part has taken, apart from buffers that follow from the config.
    mutating func refuseRest() throws {
        for key in tensors.keys where key.hasSuffix("rotary_emb.inv_freq") {
            drop(key, "derived from the config")
        }
        guard tensors.isEmpty else {
            throw ApertusError(.rejected, "\(name): unexpected \(Self.listed(tensors.keys))")
        }
    }

    /// How many tensors and the first names.
    static func listed(_ names: some Sequence<String>) -> String {
        let found = names.sorted { $0.utf8.lexicographicallyPrecedes($1.utf8) }
        let shown = found.prefix(10).map { $0.cut(80) }.joined(separator: ", ")
        let more = found.count > 10 ? " and \(found.count - 10) more" : ""
        return (found.count == 1 ? "tensor " : "\(found.count) tensors: ") + shown + more
    }

    /// The tensor called `key`, of one of `dtypes` and of `shape`; `[1]` and a scalar count as one.
    private mutating func need(_ key: String, _ dtypes: [String], _ shape: [Int]) throws -> TensorInfo {
        guard let tensor = tensors[key] else { throw missing(key) }
        try check(tensor, dtypes, shape)
        tensors[key] = nil
        return tensor
    }

    private func check(_ tensor: TensorInfo, _ dtypes: [String], _ shape: [Int]) throws {
        let single: Set<[Int]> = [[], [1]]
        guard tensor.shape == shape || single == [tensor.shape, shape] else {
            throw ApertusError(
                .rejected,
                "\(name): \(tensor.name): shape \(tensor.shape), the config says \(shape)")
        }
        guard dtypes.contains(tensor.dtype) else {
            throw ApertusError(
                .rejected,
                "\(name): \(tensor.name): type \(tensor.dtype), expected "
                    + dtypes.joined(separator: " or "))
        }
    }

    private mutating func factor(_ layout: MatrixLayout) throws -> StoredMatrix.Factor? {
        let scale = tensors.removeValue(forKey: "\(layout.path).output_scale")
        let divisor = tensors.removeValue(forKey: "\(layout.path).output_divisor")
        if scale != nil, divisor != nil {
            throw ApertusError(.rejected, "\(name): \(layout.path) has both a scale and a divisor")
        }
        guard let tensor = scale ?? divisor else { return nil }
        try check(tensor, Checkpoint.floatNames, tensor.shape == [1] ? [1] : [layout.rows])
        return scale == nil ? .divisor(tensor) : .scale(tensor)
    }

    private mutating func drop(_ key: String, _ reason: String) {
        if tensors.removeValue(forKey: key) != nil { dropped[key] = reason }
    }

    private func missing(_ key: String) -> ApertusError {
        ApertusError(.rejected, "\(name): \(key): missing")
    }
}

extension Checkpoint {
    /// The types of floats in the order in which messages list them.
    static let floatNames = ["BF16", "F16", "F32"]
}
