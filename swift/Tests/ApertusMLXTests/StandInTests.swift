import MLX
import Testing

@Test func arithmeticIsThere() {
    let sum = MLXArray([1, 2, 3] as [Float]) + MLXArray([1, 1, 1] as [Float])
    eval(sum)
    #expect(sum.asArray(Float.self) == [2, 3, 4])
}
