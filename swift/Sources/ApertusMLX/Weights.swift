import ApertusCore
import MLX

/// The arrays of a checkpoint in the type that is computed with; each is taken once.
struct Weights {
    let checkpoint: Checkpoint
    let computeType: DType
    private var arrays: [String: MLXArray] = [:]

    /// Read the arrays of `checkpoint`, whose names, shapes and types are matched, one by one.
    ///
    /// - Parameters:
    ///   - computeType: nil stands for bfloat16 where all weights are stored so and a GPU computes,
    ///     else float32: without a GPU 16-bit arithmetic is emulated.
    ///   - onBytes: is told the bytes read so far and in all.
    /// - Throws: `ApertusError` that names the file or tensor.
    init(_ checkpoint: Checkpoint, computeType: DType?, onBytes: ((Int, Int) -> Void)?) throws {
        self.checkpoint = checkpoint
        let isBFloat = checkpoint.floatTypes.isSubset(of: ["BF16"])
        let type = computeType ?? (computesOnGPU && isBFloat ? .bfloat16 : .float32)
        self.computeType = type

        let wanted = checkpoint.files.tensors.filter { checkpoint.dropped[$0.key] == nil }
        let shapes = Dictionary(
            uniqueKeysWithValues: Layout.vectors(checkpoint.config).map { ($0.name, $0.shape) })
        let total = wanted.values.reduce(0) { $0 + $1.byteCount }
        var done = 0
        for file in checkpoint.files.names {
            let url = checkpoint.folder.appendingPathComponent(file)
            var loaded: [String: MLXArray]
            do {
                loaded = try loadArrays(url: url)
            } catch {
                throw ApertusError(.rejected, "\(url.path): cannot be read (\(error))")
            }
            let inFile = wanted.values.filter { $0.file == file }
            for info in inFile.sorted(by: { $0.name < $1.name }) {
                guard let stored = loaded.removeValue(forKey: info.name), stored.shape == info.shape
                else {
                    throw ApertusError(
                        .rejected, "\(url.path): was changed while it was loaded; start again")
                }
                let shape = shapes[info.name] ?? info.shape
                arrays[info.name] = try Self.final(stored, info, shape, type, url.path)
                done += info.byteCount
                onBytes?(done, total)
            }
        }
        for (name, value) in checkpoint.absentConstants {
            arrays[name] = MLXArray(value).asType(type)
        }
    }

    /// One array in its final type and shape, evaluated.
    private static func final(
        _ stored: MLXArray, _ info: TensorInfo, _ shape: [Int], _ computeType: DType, _ file: String
    ) throws -> MLXArray {
        try catchingMLX("\(file): \(info.name)", kind: .rejected) {
            guard stored.dtype.isFloatingPoint else {
                eval(stored)
                return stored
            }
            let isFactor = [".output_scale", ".output_divisor"].contains {
                info.name.hasSuffix($0)
            }
            let array = stored.asType(isFactor ? .float32 : computeType).reshaped(shape)
            eval(array)
            // Of what is not finite, nothing but NaN is left.
            guard (array * Float(0) .== Float(0)).all().item(Bool.self) else {
                throw ApertusError(
                    .rejected, "\(file): \(info.name): holds values that are not finite")
            }
            return array
        }
    }

    /// Take an array; it belongs to whoever takes it.
    mutating func array(_ name: String) -> MLXArray { arrays.removeValue(forKey: name)! }

    /// Take a matrix with all that belongs to it.
    mutating func matrix(_ path: String) -> Matrix {
        let stored = checkpoint.matrices[path]!
        let weight = array(stored.weight.name)
        let codes = stored.format.map { format in
            Matrix.Codes(
                scales: array(stored.scales!.name), biases: stored.biases.map { array($0.name) },
                format: format)
        }
        let factor: MLXArray? =
            switch stored.factor {
            case .scale(let tensor): array(tensor.name)
            case .divisor(let tensor): MLXArray(Float(1)) / array(tensor.name)
            case nil: nil
            }
        return Matrix(weight: weight, codes: codes, factor: factor)
    }
}

extension QuantizedFormat {
    /// What MLX calls its mode.
    var mlxMode: QuantizationMode { QuantizationMode(rawValue: mode.rawValue)! }
}

/// Whether MLX computes on a GPU.
package var computesOnGPU: Bool {
    #if os(Linux)
        false
    #else
        true
    #endif
}
